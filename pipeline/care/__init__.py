"""Care that needs a decoder: whether the stored pictures of a video are those of its file.

In: an Archive. Out: the videos whose pictures are wrong.
Imports: nothing.
"""
