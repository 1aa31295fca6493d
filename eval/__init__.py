"""Evaluation: protocols, detectors, metrics, statistics, verdicts and reports, each imported from its file.

Nothing is imported here: what decides by a report needs neither PyTorch nor SciPy.
"""
