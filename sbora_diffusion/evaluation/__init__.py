"""How good a concept is, by itself and merged.

judges/      models that score images: one file for each kind
metrics/     the formulas: alignment scores, bootstrap intervals
suites/      the prompts
evaluate.py  from adapters to a report; series.py and gallery.py are its images, folder.py scores other people's images
reports/     scores, tables, JSON, image grids
comparison/  several methods side by side
"""
