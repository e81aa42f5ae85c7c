"""Classifies images, measures accuracy, and explains and draws the results."""
