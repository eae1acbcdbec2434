"""Sweeps: candidates over rules, α and recipes, made one at a time, judged by a command, with controls beside them.

settings → candidates (what is asked for) → controls (what stands beside) → work (the directory and its log) → run;
metrics and command judge one model, result holds what came of all, table and drawing show it, keep makes one again.
"""
