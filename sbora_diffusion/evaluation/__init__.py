"""How good a concept is, by itself and merged.

judges/      models that score images: one file for each kind
metrics.py   the formulas: alignment scores, bootstrap intervals
suites.py    the prompts
evaluate.py  from adapters to a report: images.py generates, report.py writes; folder.py scores other people's images
quick.py     scores during a training
comparison/  several methods side by side
"""
