"""Migrations, which ``manage.py migrate`` runs with "syncstream" in INSTALLED_APPS.

The tables of ``Hub("postgresql:…")``, in databases that are PostgreSQL; in others
nothing. Without it the hub creates them by itself at its first use, if it may. They
are no models: nothing here asks for more migrations.
"""
