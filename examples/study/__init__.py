"""A study of rules, recipes and controls on a small model: many fine-tunings, each swept and judged.

tasks says what is learned and asked, models trains, judge measures, run carries all of it out, and
table and figure say what came of it.
"""
