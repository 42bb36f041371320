"""The Python interface behind `import vidx`: what the commands do, as functions and objects.

In: Python values. Out: the same as the commands give, as objects, tables and arrays.
Imports: pipeline.ask, pipeline.cluster, pipeline.index, pipeline.results.
"""
