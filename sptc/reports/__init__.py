"""What is told of a compile: the table, `explain`, dumps, repro scripts, and the kernels that the graph will launch.

Only reading: nothing here changes what is computed.
"""
