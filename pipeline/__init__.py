"""What a user asks for: indexing, searching, asking, caring, and their commands and Python interface.

times, sizes and streams are small modules that rooms share. vidx is the public package, `import vidx`.
"""
