"""``python -m syncstream doctor``: why does a stream not arrive as one?"""
