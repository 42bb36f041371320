"""The computation: identify, decode and encode sources, and answer questions. Nothing here starts or joins Ray.

actors holds the classes that Ray runs, segment indexes one segment from file to part. child_process, protocol (its
messages) and sandbox (what it gives up) serve the rooms that read hostile files in a process, decode and models.
cache_folder says where files are kept that can be made again.
"""
