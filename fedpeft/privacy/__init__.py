"""One file per promise; what is promised to whom, and what keeps it.

The round, not the user, owns the order::

    client   update -> weight -> clip (all that travels, as one vector) -> uplink codec
    server   decode -> weight -> clip again -> sum -> noise on the sum -> what the aggregator
             makes of the sum, over a denominator fixed before the replies -> optimizer

``Privacy.mechanism`` is asked once how cohorts are drawn (``Sampling``) and returns one object
that clips, adds noise and counts epsilon, so that these cannot disagree. The server hands the
aggregator one update, the noised sum: what an aggregator, optimizer or downlink makes of it is
post-processing. A promise about records has no mechanism at the server; it belongs into the
trainer, with an accountant per client.
"""
