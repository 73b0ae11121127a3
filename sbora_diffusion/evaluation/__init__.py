"""How good a concept is, alone and merged: suites of prompts, judges, scores and reports."""
