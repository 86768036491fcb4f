-- What plain SQL changes or removes of orders and of the history of settings is audited as well.

-- One function for the tables of which plain SQL alone changes or removes what it tells. Arguments: what the action
-- begins with, and the column that names a row.
create function s2s_audit_row() returns trigger language plpgsql as $$
declare
    before jsonb := to_jsonb(old);
    after jsonb := case tg_op when 'DELETE' then '{}' else to_jsonb(new) end;
begin
    insert into audit (actor, action, subject, params, result)
    values (s2s_actor(), s2s_action(tg_argv[0] || case tg_op when 'DELETE' then '.delete' else '.change' end),
        coalesce(after ->> tg_argv[1], before ->> tg_argv[1]),
        (select coalesce(jsonb_object_agg(key, value), '{}') from jsonb_each(after)
            where before -> key is distinct from value),
        (select jsonb_build_object('was', jsonb_object_agg(key, value)) from jsonb_each(before)
            where after -> key is distinct from value));
    return null;
end
$$;

-- Of orders: what they are from the beginning, and how they ended. The steps in between change nothing of either.
create trigger orders_audit_change
    after update of order_id, rpc, params, actor, idem_key, created_at, status, result on orders for each row
    when ((old.order_id, old.rpc, old.params, old.actor, old.idem_key, old.created_at)
            is distinct from (new.order_id, new.rpc, new.params, new.actor, new.idem_key, new.created_at)
        or old.status in ('done', 'refused', 'failed')
            and (old.status, old.result) is distinct from (new.status, new.result))
    execute function s2s_audit_row('orders', 'order_id');
create trigger orders_audit_delete after delete on orders
    for each row execute function s2s_audit_row('orders', 'order_id');
create trigger orders_audit_truncate before truncate on orders
    for each statement execute function s2s_audit_truncate('orders.delete', 'order_id', '{order_id}');

create trigger config_history_audit_change after update on config_history for each row
    when (old.* is distinct from new.*) execute function s2s_audit_row('config_history', 'key');
create trigger config_history_audit_delete after delete on config_history
    for each row execute function s2s_audit_row('config_history', 'key');
create trigger config_history_audit_truncate before truncate on config_history
    for each statement execute function s2s_audit_truncate('config_history.delete', 'key', '{}');

-- As those of migration 0012.
do $$
begin
    execute format('alter function s2s_audit_row() set search_path = pg_catalog, %I, pg_temp', current_schema());
end
$$;
