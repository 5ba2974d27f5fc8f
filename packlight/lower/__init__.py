"""A schedule written as code that runs it."""
