"""What is told of a compile: the table, `explain`, what the log says, dumps, repro scripts, and the kernels that the graph will launch.

Only reading: nothing here changes what is computed.
"""
