"""Parts: the Parquet files that hold the frames of segments: tokens, patches, search keys and thumbnails.

In: TokenBatch. Out: a written Part; later single cells, each checked by its checksum.
Imports: nothing.
"""
