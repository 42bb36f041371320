"""Care of an archive: whether the stored pictures of a video are those of its file, ages, and all regular care in one.

In: an Archive. Out: the videos whose pictures are wrong, or that are old; what was done.
Imports: nothing.
"""
