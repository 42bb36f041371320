"""Parts: the Parquet files that hold the frames of segments: tokens, patches, search keys and thumbnails.

In: TokenBatch. Out: Receipt; later single cells, mapped and checked row by row.
Imports: nothing.
"""
