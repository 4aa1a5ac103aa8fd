"""The page of `cmtool edit page`: pictures edited and sampled in a browser, by one model.

`desk.py` answers what the page asks for, `server.py` speaks HTTP, `static/` is the page itself.
"""
