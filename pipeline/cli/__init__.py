"""The command `vidx`: a module for each command or a few alike, and what they share.

In: the command line. Out: text or JSON, and an exit code.
Imports: pipeline.ask, pipeline.care, pipeline.cluster, pipeline.evaluate, pipeline.index, pipeline.results.
"""
