"""Measurements that anyone can run again: ``make bench``. Reports are written to bench/reports/."""
