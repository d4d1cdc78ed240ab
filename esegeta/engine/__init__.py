"""How things are computed, never what.

Everything clever or stateful lives here: the folded call, the gradient primitive, streaming, memory,
layout, precision, progress and deadlines. The rest of the package is small pure functions on top.
"""
