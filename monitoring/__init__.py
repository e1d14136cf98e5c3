"""Prediction log, drift reports, alarms and the promotion gate."""
