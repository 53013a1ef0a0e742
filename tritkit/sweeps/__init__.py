"""``tritkit sweep``: many recipes on one model, each quantised and measured alike, one row each, one table."""
