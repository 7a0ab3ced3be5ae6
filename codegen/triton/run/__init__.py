"""From source to a kernel that runs, is recorded, interpreted, or compiled ahead of time.

`load`, `interpreter` and `aot` import Triton, so they are imported when a kernel is first launched.
"""
