"""What is kept: archives of frames and videos, their tables, their vector index, and the care of them.

The modules beside the rooms are used by all of them: records (the nouns of the data's path), errors, files (every place
is a URI), checked (what an archive says is not trusted), iso_time and processes. sql stands over the tables.
"""
