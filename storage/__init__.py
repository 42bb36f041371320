"""Archives: the tables of frames and videos, the vector index, and the care of them.

All rooms use the modules beside them: records (the data that one step hands to the next), errors, files (local files by
URI), checks (of what an archive says), iso_time and processes. sql reads the tables.
"""
