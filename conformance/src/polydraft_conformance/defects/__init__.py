"""Defective backends as data: each fails one check, with a message that names its cause.

They are the reference engine (polydraft-reference) with something changed, modelled on faults that engines have had.
``polydraft-conformance defects`` lists them.
"""
