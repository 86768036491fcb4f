-- Lists: an index for each filter that people may ask by, in the order in which pages are read. Commands by their type,
-- and those that are ready or done, have none: it would cost every push. s2s/store/tables/lists.py reads them in stretches.
create index audit_actor on audit (actor, audit_id);
create index audit_action on audit (action, audit_id);
create index commands_cancelled on commands (cmd_id) where status = 'cancelled';
create index outbox_dead on outbox (outbox_id) where state = 'dead';
create index orders_by_status on orders (status, created_at, order_id);
create index orders_by_rpc on orders (rpc, created_at, order_id);
create index orders_by_rpc_and_status on orders (rpc, status, created_at, order_id);
create index config_history_key on config_history (key, version);
