"""Questions: a query to moments, and a question to an answer with the moments it rests on.

In: an Archive, a query or a question, and a Filter. Out: Moments, or an Answer.
Imports: nothing.
"""
