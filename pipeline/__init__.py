"""What a user does with vidx: indexing, search, questions and care, in commands and in Python.

The rooms share the small modules times, sizes and streams. vidx is the public package, `import vidx`.
"""
