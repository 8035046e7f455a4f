"""Adapters to other libraries, a module each: it needs its library when it is imported, and nothing else imports it."""
