"""Choice by measurement: which engine, drafter and k are fastest here, and what ``load`` makes of it.

``_command`` is ``polydraft.tune``. ``_search`` decides what is measured when, and what is surely worse; a ``_bench``
measures it, each engine in a process of its own (``_child``, which has a ``_loaded`` engine). ``_records`` holds what
comes out, ``_store`` keeps it, ``_choice`` is what ``load`` reads, ``_chart`` draws it. ``_prompts`` are those that
are measured where the user gives none.
"""
