-- The boot_id of the engine that declared a job's schedule last.
alter table jobs add column declared_by text;
