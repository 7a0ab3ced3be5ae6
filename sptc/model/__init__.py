"""The user's model: loaded by name, captured under Dynamo, and the compiled callable that stands for it afterwards.

What a graph means is not decided here: that is for passes.
"""
