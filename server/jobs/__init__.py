"""Jobs: durable work that outlives its request and its process, with webhooks at its end.

`durable` is the only module with DBOS, and `store` the only one with SQL. Both are imported only if jobs are on.
"""
