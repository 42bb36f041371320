"""The command `vidx`: a module for each command, and what they share.

In: the command line. Out: text or JSON, and an exit code.
Imports: pipeline.ask, pipeline.care, pipeline.cluster, pipeline.evaluate, pipeline.index, pipeline.results.
"""
