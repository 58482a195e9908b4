"""Comparing norms on one dataset: plan, jobs and report."""
