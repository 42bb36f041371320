"""What computes: sources are identified, decoded, encoded; a model answers. Nothing here knows Ray's cluster.

actors are the thin shells that Ray runs, segment is one segment from file to part. protocol (messages between
processes) and sandbox (what a process gives up) serve the rooms with processes of their own, decode and models.
"""
