"""The session that functions over the registry take, by name, for parts that know no more of the database."""

from sqlalchemy.orm import Session as Session
