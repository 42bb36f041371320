"""Sources: the identity of a video by its bytes, and the one open file that a decoder may read.

In: VideoAsset. Out: Content, and an open file.
Imports: nothing.
"""
