"""Frameworks that application code uses flags with; nothing here is loaded unless asked for."""
