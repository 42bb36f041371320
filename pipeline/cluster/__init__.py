"""Ray: starting or joining a cluster, its workers, and supervision when it dies.

In: tasks, or a question. Out: their outcomes, or an answer that a worker gave.
Imports: pipeline.ask.
"""
