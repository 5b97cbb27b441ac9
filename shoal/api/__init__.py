"""The words of the HTTP API: models of requests and answers, and the filter language."""
