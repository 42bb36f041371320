"""Models as directories: which one a name means, its settings, its tensors, its download, and loading.

In: a hub id or a directory. Out: a Bundle, and modules filled from its checkpoint.
Imports: nothing.
"""
