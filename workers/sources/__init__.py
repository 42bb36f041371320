"""Sources: the identity of a video, by its bytes, and the open file that a decoder reads.

In: a path. Out: its Content, which the hash cache remembers, and an open file.
Imports: nothing.
"""
