"""Sources: the identity of a video by its bytes, and the one open file that a decoder may read.

In: a path. Out: the Content that it has, remembered by the hash cache, and an open file.
Imports: nothing.
"""
