"""Evaluation: how well search finds moments whose truth is known.

In: described moments and a search. Out: recall and precision.
Imports: nothing.
"""
