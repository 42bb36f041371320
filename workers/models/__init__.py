"""Models on disk: finding one by its name, its settings and tensors, downloading, and loading.

In: a hub id or a directory. Out: a Bundle, and modules filled from its checkpoint.
Imports: nothing.
"""
