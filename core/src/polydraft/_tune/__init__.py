"""Choice by measurement: which engine, drafter and k are fastest here, and what ``load`` makes of it.

``_command`` is ``polydraft.tune``. ``_search`` decides what is measured when, and what is surely worse; a bench of
``polydraft._measuring`` measures it. ``_records`` holds what comes out, ``_store`` keeps it, ``_choice`` is what
``load`` reads, ``_chart`` draws it.
"""
