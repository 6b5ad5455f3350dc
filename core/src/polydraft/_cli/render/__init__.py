"""Rendering only: tables, reports and JSON from results; no decisions here."""
