"""``polydraft bench``: speculative decoding beside plain decoding, in figures.

``command`` is ``polydraft.bench``. ``turns`` has the sides take turns on a bench of ``polydraft._measuring``, ``rows``
makes figures of their calls, ``records`` holds them, ``chart`` draws them.
"""
